"""Decides: what runs where and when. Ray is imported only at its edge."""

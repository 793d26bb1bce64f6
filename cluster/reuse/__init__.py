"""What of earlier requests is kept for later ones, in integers; imports no other room."""

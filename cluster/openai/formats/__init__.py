"""How models write calls of tools into their text, a file for each format. Imports words alone."""

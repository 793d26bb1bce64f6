"""`saqqara top`: an engine on a terminal. Imports the snapshot of `live`; no Ray, no torch."""

"""Training: settings, text, optimizer, a loop that survives being killed, and the folder it leaves behind."""

"""What the servers show of themselves."""

"""`prfl accept`: first contact with a GPU: what teaches most first, and a report of what was found."""

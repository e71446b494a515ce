"""`prfl accept`: first contact with a GPU, most teaching measurements first, and a report of what was found."""

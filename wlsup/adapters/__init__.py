"""Small modules attached to a frozen encoder from outside; one file a method."""

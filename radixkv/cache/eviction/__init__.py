"""In which order unused leaves leave the tree."""

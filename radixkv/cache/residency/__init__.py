"""What a page needs besides its number before a hit may end there."""

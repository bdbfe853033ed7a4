"""What keeping the states of recurrent layers costs."""

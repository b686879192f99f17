"""`--tiny`: a whole recipe on a laptop with tiny random models of the same classes."""

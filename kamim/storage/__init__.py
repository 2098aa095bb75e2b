"""The format of a store, and the files it is made of."""

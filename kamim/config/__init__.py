"""The configuration of every command: its schema and its loader."""

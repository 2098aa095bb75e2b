"""Offline: source images -> store."""

"""Embed once, probe fast, report."""

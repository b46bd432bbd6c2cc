"""Memories of many parents."""

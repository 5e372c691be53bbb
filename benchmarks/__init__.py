"""Measurements whose figures the README and the docs quote; each is a command."""

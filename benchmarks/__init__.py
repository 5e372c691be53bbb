"""Measurements whose figures the README and the docs quote; each is a command.

Peers come with ``pip install "cnf[bench]"``, torchdyn in an environment of its own
(``peers_torchdyn.py``); who is missing is left out, and said.
"""

"""Measurements whose figures the README and the docs quote; each is a command.

Peers come with ``pip install "cnf[bench]"``; who is missing is left out, and said. torchdyn is not
among them: it brings a training framework along, and its continuous flow is torchdiffeq's solver
around a reverse-mode trace, which ``reference.py`` stands for.
"""

"""The load generator behind ``deltaserve bench``: what is asked, how it is sent, and what came of it.

It speaks HTTP to a running server and imports nothing of the server's other parts.
"""

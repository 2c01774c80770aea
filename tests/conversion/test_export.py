"""`deltanet export`: what the folder holds, and what is refused before it is made. (tests/serving runs it.)"""

"""At home in other people's tools: what each of them calls to get an optimizer of this package.

A tool that takes any torch optimizer (accelerate, a loop of one's own) needs nothing from here.
"""

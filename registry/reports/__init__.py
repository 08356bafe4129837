"""Reports: what a diff or a plan found, as text, Markdown and HTML.

It draws what it is given, asks no registry and loads no torch.
"""

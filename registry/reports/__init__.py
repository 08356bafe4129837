"""Reports: blocks, and the renderers that draw them as text, Markdown and HTML.

Block: a title, a list, a table, a tree, bars, curves, or a text to copy.
Renderer: a module with one function, `render`, which draws a list of blocks.
Line, page: text and Markdown are lines; HTML is a page. A block may be for one of them alone.
Part: what a thing shows of itself in a notebook; `notebook` makes parts of plain data.

It knows nothing of diffs, plans or versions, and imports only `registry.store.text`. A new section of a report is a
method where the report is, such as `registry.transfer.report`; a new form is a module here; a new kind of block is a
class in `blocks` and a case in each renderer.
"""

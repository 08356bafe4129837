"""The pages of `registry ui`: a registry in the browser, served on this machine.

Page: what one address shows, as data: a document for programs, rows for a spreadsheet, and what its template draws.
Reader: the one thread that asks the registry. State: what tells that a page has changed. Stream: the events that a browser
listens to. Access: who may ask. Worker: the child process that loads torch, where a page needs it.

It imports every layer below it, and nothing imports it but `registry.cli.ui`. To add a page: a function from a registry
and the arguments of an address to a `Page`, a template, and a row in `app`.
"""

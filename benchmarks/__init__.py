"""Side-by-side measurements against the tools that people use now.

Run `python -m benchmarks`. Each module measures one group and has a function `measure(folder, scale)`, which returns a
`Section`. It may import the library and its networks. To add a group, write a module and add it to `GROUPS` in
`__main__`.
"""

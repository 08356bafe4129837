"""Side-by-side measurements against the tools that people use now. Run: python -m benchmarks"""

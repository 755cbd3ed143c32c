"""What the benchmarks share: shapes, inputs, peers, timing, ceilings, checks and the roofline picture.

Nothing here is loaded by `import diffulex`.
"""

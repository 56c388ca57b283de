"""``fastsae bench``: shapes and costs, contestants, the float64 truth, clocks, the report, and the run of them all.

Free to import; ``run`` is what the command calls.
"""

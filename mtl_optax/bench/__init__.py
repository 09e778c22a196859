"""Side-by-side measurements: ratios within one run, memory from the compiler."""

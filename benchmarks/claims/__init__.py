"""The paper's claims, measured: ``python -m benchmarks.claims --preset cpu``.

Read from the top: `grid` says what is compared, `presets` at which size, `statistics` what decides;
`running` does the runs and `results` keeps them; `tables`, `plots` and `page` show them.
"""

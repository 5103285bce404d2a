"""What `sslsr check-gpu` does: a table of steps, each in a process of its own, and a report that can be pasted into an issue.

`steps` (the table), `runner` and `play` import nothing beyond Python's own library, so that a broken driver breaks one step and not the
report.
"""

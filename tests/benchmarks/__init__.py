"""Speed, memory and quality tables, run by hand with ``make bench``; never part of the tests."""

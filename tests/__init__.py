"""Tests. A package, so that the ranks of a test can import its module by name."""

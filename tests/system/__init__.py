"""Tests of what crosses modules, by subject. Other tests mirror the package."""

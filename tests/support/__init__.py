"""Networks, data, references and comparisons that several test files share."""

"""A local server that speaks the Hub's protocol, and the tests that drive the real client against it."""

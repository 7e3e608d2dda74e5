"""The model process. Nothing outside this package imports it: it is started as a process of its own."""

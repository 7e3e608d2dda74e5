"""One module per question, each comparing two things in one run: `script/bench NAME`."""

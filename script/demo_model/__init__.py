"""How the demo model is made: `script/train-demo-model`."""

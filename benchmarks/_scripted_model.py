"""The model process with scripted answers, for a server on random weights: see _network.py and latency.py."""

from wyoming_qwen_asr.model.__main__ import main

from ._network import scripted

if __name__ == "__main__":
    with scripted(0.75):
        main()

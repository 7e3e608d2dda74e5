"""Bounds and deadlines of the gateway, each with its reason. None is a setting: nobody needs to turn them."""

MAX_CONNECTIONS = 64
"""Wyoming TCP connections. Home Assistant holds one per utterance and one per poll."""

MAX_SESSIONS = 16
"""Streams of audio at once: more than a house has microphones."""

MAX_UTTERANCE_SECONDS = 600.0
"""Of one session. Home Assistant ends a command after 15 s, a dictation rarely lasts ten minutes."""

OPEN_SECONDS = 2 * MAX_UTTERANCE_SECONDS
"""From the first audio of a session to its end: who sends slower than half real time never comes to one."""

MAX_RETAINED_BYTES = 32 * 1024 * 1024
"""Audio of one session that the model has not finished with; ten minutes of 16 kHz mono are 19 MB."""

MAX_CONTEXT_CHARACTERS = 2000
"""Names and terms that bias one utterance; the model takes about 10,000 tokens, and reads all of them each time."""

MAX_UPLOAD_BYTES = 200 * 1024 * 1024
"""One file sent to the HTTP endpoint."""

UTTERANCE_IDLE_SECONDS = 30.0
"""Silence on a connection in mid-utterance: the client is gone."""

CONNECTION_IDLE_SECONDS = 300.0
"""Silence on a connection between utterances."""

LOAD_SECONDS = 300.0
"""A model that is not loaded by then will not be."""

FINAL_SECONDS = 60.0
"""From the end of the audio to its final, besides twice the audio's length: slower than that is a hang."""

MAX_RESTARTS = 2
"""How often a session's audio is given to a new model process before its client gets an error."""

DRAIN_SECONDS = 20.0
"""What is in flight may finish after SIGTERM; container runtimes kill after 30 s when told so."""

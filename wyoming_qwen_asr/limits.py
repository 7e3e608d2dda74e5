"""Bounds and deadlines of the gateway, each with its reason: those that nobody needs to turn. How many connections
and sessions there may be is a setting (settings.py), how long an event may be is a matter of events.py."""

MAX_UTTERANCE_SECONDS = 600.0
"""Of one session. Home Assistant ends a command after 15 s, a dictation rarely lasts ten minutes."""

OPEN_SECONDS = 2 * MAX_UTTERANCE_SECONDS
"""From the first audio of a session to its end: who sends slower than half real time never comes to one."""

MAX_UNCONFIRMED_SECONDS = 60.0
"""Audio of one session whose text is not delivered yet: twice what the model recognises as a whole. Who is further
ahead is read no more until the model has caught up; what the client cannot send, it keeps, so nothing is lost."""

MAX_UNCONFIRMED_FILE_SECONDS = 160.0
"""The same of a file, which is ahead from the start: eight pieces of 20 s, so that they are computed as one batch."""

MAX_PIECE_SECONDS = 30.0
"""What the model recognises as a whole at most: any session may always be this far ahead, or it would never come to a
segment that makes room again."""

MAX_RETAINED_BYTES = 64 * 1024 * 1024
"""Audio of all sessions together: twice sixteen sessions that are 60 s ahead at 16 kHz. Beyond it none gets further
ahead than a piece, and no new one begins. For files half of it counts: they take no room from those who speak."""

MAX_WAITING = 16
"""Uploads that may wait for one of the places that files have; the next one is told to come again. They are not read
meanwhile, so they cost a connection each."""

WAIT_SECONDS = 300.0
"""An upload waits so long for a place; most clients wait for ten minutes."""

HTTP_IDLE_SECONDS = 75.0
"""An HTTP connection without a request, or with half of one."""

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
"""From the end of the audio to its final, besides twice the audio's length; loading and replays included, because a
person waits. Home Assistant gives up after 300 s."""

MAX_STRIKES = 2
"""Model processes that may crash, hang or run out of memory over one session: the second time it was alone."""

MAX_REPLAYS = 5
"""Of one session's audio to another model process, after one that was not killed from outside: that costs time alone,
and no utterance is lost however often it happens in REPLAY_SECONDS."""

REPLAY_SECONDS = 60.0
"""Spent on replays of one session in all; after that there is not another one."""

DRAIN_SECONDS = 20.0
"""What is in flight may finish after SIGTERM; container runtimes kill after 30 s when told so."""

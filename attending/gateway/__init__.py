"""The only door: keys, the chat page and OpenAI's API, in front of the engine or another server."""

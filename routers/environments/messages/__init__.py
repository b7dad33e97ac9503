"""Agents that own their loop and speak OpenAI's messages, as environments: each of their calls is one step."""

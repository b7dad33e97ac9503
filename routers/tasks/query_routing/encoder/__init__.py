"""The encoder-size policy of query routing: embeddings of queries, features of members, the objectives of the core."""

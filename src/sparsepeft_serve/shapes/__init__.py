"""The shapes of requests that clients speak: each a router over the same service."""

"""The web page of `sgformer app`: `networks` explain images in a `worker` process, `session` queues requests for it,
`page` and `server` present the results."""

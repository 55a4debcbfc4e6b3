"""The page of `sgformer app`: `networks` explain images in a `worker` process, `session` queues visitors for it, `page`
and `server` show the results."""

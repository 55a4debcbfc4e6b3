"""The page of `sgformer app`: `networks` look, in the process of a `worker`; `desk` lets people in one after the other;
`server` guards and answers HTTP; `page` is what one sees."""

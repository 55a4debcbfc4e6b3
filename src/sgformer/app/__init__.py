"""The page of `sgformer app`: `desk` asks networks, `server` guards and answers HTTP, `page` is what one sees."""

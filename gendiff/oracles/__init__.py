"""What is valid.  An oracle takes a batch and gives one Boolean a sample; it may be any black box on the host."""

"""The law that dlm answers with if none is named: several fits of two forms, weighted by how well they predict."""
